"""Engines execute the frozen backbone; see `autodeco.engines.base` for their protocol."""
