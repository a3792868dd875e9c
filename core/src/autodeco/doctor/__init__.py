"""`autodeco doctor`: what is installed here, and whether a job's processes can work together."""
