"""Llama 3.1 for AutoDeco."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_llama31.family import FAMILY

plugin = FamilyPlugin(FAMILY)
