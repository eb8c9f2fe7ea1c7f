"""Training over stored features: heads (models.fineco) and VideoCLIP's own towers. Only commands that train load it."""
