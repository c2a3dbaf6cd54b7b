"""What a masked image model is to predict."""
