"""The decoding process: the one home of PyAV, and never of torch."""
