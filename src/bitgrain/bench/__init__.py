"""Speed as a share of what this machine does at best, measured beside every sample."""
