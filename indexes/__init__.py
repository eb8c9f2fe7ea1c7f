"""Vectors to nearest neighbours: which FAISS index, how it is built, kept on disk and searched."""
