"""What turns frames and text into vectors."""
