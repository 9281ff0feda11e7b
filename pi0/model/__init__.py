"""The network: vision tower, two-expert transformer, flow field. It knows no robot and no files."""
