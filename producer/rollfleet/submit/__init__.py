"""From a data set to the prompts stream."""
