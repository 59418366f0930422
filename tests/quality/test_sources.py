"""What must hold of the source tree itself, whatever the code in it does."""
