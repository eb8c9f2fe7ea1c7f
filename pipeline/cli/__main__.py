"""`python -m pipeline.cli`, for a checkout that is not installed."""

from pipeline.cli import main

main()
