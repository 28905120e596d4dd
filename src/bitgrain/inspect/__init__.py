"""What can be said of a checkpoint and a machine without loading: reports for people and for programs."""
