"""The recipes by name: one file each, with source, command and the figure to expect."""

from training.recipes.ce_cifar100 import CE_CIFAR100
from training.recipes.ldam_drw_cifar100 import LDAM_DRW_CIFAR100
from training.recipes.ride_cifar100 import RIDE_CIFAR100
from training.recipes.ride_imagenet_lt_r10 import RIDE_IMAGENET_LT_R10
from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50
from training.recipes.ride_imagenet_lt_x50 import RIDE_IMAGENET_LT_X50
from training.recipes.ride_inaturalist_r50 import RIDE_INATURALIST_R50
from training.recipes.ride_own import RIDE_OWN
from training.recipes.ride_swin_s import RIDE_SWIN_S
from training.recipes.ride_swin_t import RIDE_SWIN_T

LARGE = (
    RIDE_IMAGENET_LT_R10, RIDE_IMAGENET_LT_R50, RIDE_IMAGENET_LT_X50, RIDE_INATURALIST_R50, RIDE_SWIN_T, RIDE_SWIN_S,
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (RIDE_CIFAR100, LDAM_DRW_CIFAR100, CE_CIFAR100, RIDE_OWN, *LARGE)}
