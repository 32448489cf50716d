"""Pictures, verdicts and figures of timelines are made of runs here."""
