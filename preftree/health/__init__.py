"""Is a run healthy: findings in plain words, as pure functions of what a run has logged. No torch, no files."""
