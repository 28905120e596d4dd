"""Modules that hold a weight and a kernel; no format knowledge."""
