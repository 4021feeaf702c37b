"""The recipes by name: one file each, with source, command and the figure to expect."""

from training.recipes.ce_cifar100 import CE_CIFAR100
from training.recipes.ldam_drw_cifar100 import LDAM_DRW_CIFAR100
from training.recipes.ride_cifar100 import RIDE_CIFAR100
from training.recipes.ride_own import RIDE_OWN
from training.recipes.shike_cifar100 import SHIKE_CIFAR100

RECIPES = {recipe.name: recipe for recipe in (RIDE_CIFAR100, LDAM_DRW_CIFAR100, CE_CIFAR100, RIDE_OWN, SHIKE_CIFAR100)}
