"""The curvature of the main job, recorded while it trains."""
