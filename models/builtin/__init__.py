"""The small encoder that ships with fineco: it knows rendered shapes and nothing else."""
