"""What the command line calls beside training."""
