"""Recordings of a service in the formats of other projects, written with those projects' own libraries."""
