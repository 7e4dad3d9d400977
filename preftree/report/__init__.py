"""Reports: what a run folder says, as one HTML page or as Markdown. Reads run folders and nothing else."""
