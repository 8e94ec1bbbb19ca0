"""Bundles: folders with a policy that run without the service, and verify their golden samples where they run."""
