"""Devices and hosts: the mesh, how the state lies on it, and how processes meet."""
