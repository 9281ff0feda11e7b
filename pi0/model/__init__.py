"""The network: vision tower, two-expert transformer, flow field. Knows no robot and no files."""
