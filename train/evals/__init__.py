"""What a checkpoint knows: long contexts."""
