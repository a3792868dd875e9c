"""Qwen2.5 for AutoDeco."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_qwen25.family import FAMILY

plugin = FamilyPlugin(FAMILY)
