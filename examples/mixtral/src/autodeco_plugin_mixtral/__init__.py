"""Mixtral for AutoDeco."""

from autodeco.plugin import FamilyPlugin

from autodeco_plugin_mixtral.family import FAMILY

plugin = FamilyPlugin(FAMILY)
