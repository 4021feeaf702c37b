"""
The recipes by name: a file each, with source, command and the figure to expect.

Most of those on large sets share one, and so do the baselines on CIFAR that differ in their images alone.
"""

from training.recipes.ace_4_cifar100 import ACE_4_CIFAR100
from training.recipes.ace_cifar10 import ACE_CIFAR10
from training.recipes.ace_cifar10_50 import ACE_CIFAR10_50
from training.recipes.ace_cifar100 import ACE_CIFAR100
from training.recipes.ace_cifar100_50 import ACE_CIFAR100_50
from training.recipes.balanced_softmax_cifar100 import BALANCED_SOFTMAX_CIFAR100
from training.recipes.baselines_cifar import BASELINES_CIFAR
from training.recipes.baselines_large import BASELINES_LARGE
from training.recipes.bbn_cifar100 import BBN_CIFAR100
from training.recipes.cb_focal_cifar100 import CB_FOCAL_CIFAR100
from training.recipes.ce_cifar100 import CE_CIFAR100
from training.recipes.crt_cifar100 import CRT_CIFAR100
from training.recipes.decoupled_large import DECOUPLED_LARGE
from training.recipes.focal_cifar100 import FOCAL_CIFAR100
from training.recipes.ldam_drw_cifar100 import LDAM_DRW_CIFAR100
from training.recipes.lfme_cifar100 import LFME_CIFAR100
from training.recipes.logit_adjustment_cifar100 import LOGIT_ADJUSTMENT_CIFAR100
from training.recipes.lws_cifar100 import LWS_CIFAR100
from training.recipes.m2m_cifar100 import M2M_CIFAR100
from training.recipes.multi_expert_large import MULTI_EXPERT_LARGE
from training.recipes.ncm_cifar100 import NCM_CIFAR100
from training.recipes.oltr_cifar100 import OLTR_CIFAR100
from training.recipes.ride_2_cifar100 import RIDE_2_CIFAR100
from training.recipes.ride_4_cifar100 import RIDE_4_CIFAR100
from training.recipes.ride_4_distilled_cifar100 import RIDE_4_DISTILLED_CIFAR100
from training.recipes.ride_6_cifar100 import RIDE_6_CIFAR100
from training.recipes.ride_cifar10 import RIDE_CIFAR10
from training.recipes.ride_cifar10_50 import RIDE_CIFAR10_50
from training.recipes.ride_cifar100 import RIDE_CIFAR100
from training.recipes.ride_cifar100_50 import RIDE_CIFAR100_50
from training.recipes.ride_distilled_cifar100 import RIDE_DISTILLED_CIFAR100
from training.recipes.ride_imagenet_lt_r10 import RIDE_IMAGENET_LT_R10
from training.recipes.ride_imagenet_lt_r50 import RIDE_IMAGENET_LT_R50
from training.recipes.ride_imagenet_lt_x50 import RIDE_IMAGENET_LT_X50
from training.recipes.ride_inaturalist_r50 import RIDE_INATURALIST_R50
from training.recipes.ride_large import RIDE_LARGE
from training.recipes.ride_own import RIDE_OWN
from training.recipes.ride_retrained_cifar100 import RIDE_RETRAINED_CIFAR100
from training.recipes.ride_swin_s import RIDE_SWIN_S
from training.recipes.ride_swin_t import RIDE_SWIN_T
from training.recipes.ride_taught_cifar100 import RIDE_TAUGHT_CIFAR100
from training.recipes.sade_cifar100 import SADE_CIFAR100
from training.recipes.sade_cifar100_50 import SADE_CIFAR100_50
from training.recipes.shike_cifar100 import SHIKE_CIFAR100
from training.recipes.shike_cifar100_50 import SHIKE_CIFAR100_50
from training.recipes.tau_norm_cifar100 import TAU_NORM_CIFAR100

RECIPES = {
    recipe.name: recipe
    for recipe in (
        RIDE_CIFAR100, LDAM_DRW_CIFAR100, CE_CIFAR100, RIDE_OWN, RIDE_RETRAINED_CIFAR100,
        RIDE_TAUGHT_CIFAR100,
        RIDE_2_CIFAR100, RIDE_4_CIFAR100, RIDE_6_CIFAR100, RIDE_DISTILLED_CIFAR100, RIDE_4_DISTILLED_CIFAR100,
        RIDE_CIFAR100_50, RIDE_CIFAR10, RIDE_CIFAR10_50,
        SHIKE_CIFAR100, SHIKE_CIFAR100_50, SADE_CIFAR100, SADE_CIFAR100_50,
        ACE_CIFAR100, ACE_4_CIFAR100, ACE_CIFAR100_50, ACE_CIFAR10, ACE_CIFAR10_50,
        FOCAL_CIFAR100, CB_FOCAL_CIFAR100, BALANCED_SOFTMAX_CIFAR100, LOGIT_ADJUSTMENT_CIFAR100,
        CRT_CIFAR100, LWS_CIFAR100, TAU_NORM_CIFAR100, NCM_CIFAR100,
        BBN_CIFAR100, OLTR_CIFAR100, LFME_CIFAR100, M2M_CIFAR100,
        RIDE_IMAGENET_LT_R10, RIDE_IMAGENET_LT_R50, RIDE_IMAGENET_LT_X50, RIDE_INATURALIST_R50,
        RIDE_SWIN_T, RIDE_SWIN_S, *RIDE_LARGE, *BASELINES_CIFAR, *DECOUPLED_LARGE,
        *MULTI_EXPERT_LARGE, *BASELINES_LARGE,
    )
}  # fmt: skip
