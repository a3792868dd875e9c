"""GPT-OSS for AutoDeco."""

from autodeco.plugin import FamilyPlugin
from autodeco_plugin_gpt_oss.family import FAMILY

plugin = FamilyPlugin(FAMILY)
