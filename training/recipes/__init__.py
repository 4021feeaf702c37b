"""The recipes by name: one file each, with source, command and the figure to expect."""

from training.recipes.ace_4_cifar100 import ACE_4_CIFAR100
from training.recipes.ace_cifar10 import ACE_CIFAR10
from training.recipes.ace_cifar10_50 import ACE_CIFAR10_50
from training.recipes.ace_cifar100 import ACE_CIFAR100
from training.recipes.ace_cifar100_50 import ACE_CIFAR100_50
from training.recipes.ce_cifar100 import CE_CIFAR100
from training.recipes.ldam_drw_cifar100 import LDAM_DRW_CIFAR100
from training.recipes.ride_2_cifar100 import RIDE_2_CIFAR100
from training.recipes.ride_4_cifar100 import RIDE_4_CIFAR100
from training.recipes.ride_4_distilled_cifar100 import RIDE_4_DISTILLED_CIFAR100
from training.recipes.ride_6_cifar100 import RIDE_6_CIFAR100
from training.recipes.ride_cifar10 import RIDE_CIFAR10
from training.recipes.ride_cifar10_50 import RIDE_CIFAR10_50
from training.recipes.ride_cifar100 import RIDE_CIFAR100
from training.recipes.ride_cifar100_50 import RIDE_CIFAR100_50
from training.recipes.ride_distilled_cifar100 import RIDE_DISTILLED_CIFAR100
from training.recipes.ride_own import RIDE_OWN
from training.recipes.sade_cifar100 import SADE_CIFAR100
from training.recipes.sade_cifar100_50 import SADE_CIFAR100_50
from training.recipes.shike_cifar100 import SHIKE_CIFAR100
from training.recipes.shike_cifar100_50 import SHIKE_CIFAR100_50

RECIPES = {
    recipe.name: recipe
    for recipe in (
        RIDE_CIFAR100, LDAM_DRW_CIFAR100, CE_CIFAR100, RIDE_OWN,
        RIDE_2_CIFAR100, RIDE_4_CIFAR100, RIDE_6_CIFAR100, RIDE_DISTILLED_CIFAR100, RIDE_4_DISTILLED_CIFAR100,
        RIDE_CIFAR100_50, RIDE_CIFAR10, RIDE_CIFAR10_50,
        SHIKE_CIFAR100, SHIKE_CIFAR100_50, SADE_CIFAR100, SADE_CIFAR100_50,
        ACE_CIFAR100, ACE_4_CIFAR100, ACE_CIFAR100_50, ACE_CIFAR10, ACE_CIFAR10_50,
    )
}  # fmt: skip
