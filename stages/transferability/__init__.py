"""Which backbone fits the data, and what it costs. No stage: `pipeline rank` uses it before there is a run."""
