"""What is made of runs: pictures, verdicts and figures of timelines."""
