"""Many processes as one run: how they start, meet, watch each other, log and end."""
