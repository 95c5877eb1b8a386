"""Who says what is better: statistics, LLM judges, reward models on any set."""
