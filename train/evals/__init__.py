"""What a model learned: evaluations beside the loss."""
