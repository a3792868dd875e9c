"""The two decoding heads: modules, objective, random drop, warp and files.

Importing this package loads nothing heavy; import the submodule that you need.
"""
