"""DeepSeek-V3 for AutoDeco."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_deepseek_v3.family import FAMILY

plugin = FamilyPlugin(FAMILY)
