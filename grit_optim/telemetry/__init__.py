"""Record a run: snapshots of a step, recorders that feed sinks, reports on request."""
