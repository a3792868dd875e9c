"""Qwen3 for AutoDeco."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_qwen3.family import FAMILY

plugin = FamilyPlugin(FAMILY)
