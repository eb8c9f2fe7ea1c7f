"""The published protocols over a collection: retrieval, multiple choice, questions, moments; and their reports."""
