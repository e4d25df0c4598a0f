"""mergekit's own configuration files, carried out by Overhaul's streams: `overhaul merge CONFIG.yml -o DIR`."""

from overhaul.mergekit.run import MergePlan as MergePlan
from overhaul.mergekit.run import merge_config as merge_config
from overhaul.mergekit.run import plan_config as plan_config
