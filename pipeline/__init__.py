"""The stages of fineco, from video files to answers, and what carries them."""
