"""RIDE on ImageNet-LT with Swin-T."""

from training.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

RIDE_SWIN_T = Recipe(
    # RIDE, 3 experts of reduced width, Swin-T, ImageNet-LT by its list files, no routers.
    # Published by the authors: 54.4 % top-1 (many 65.7, medium 50.7, few 35.5).
    # Differences: test images are scaled bilinearly, not bicubically; RandAugment is torchvision's; the learning rate
    # moves once an epoch.
    # Run:   ride-train ride-swin-t --data path/to/imagenet-lt
    name="ride-swin-t", method="ride", loss="ldam", data="", profile="natural",
    image_size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, backbone="swin_t", n_experts=3, reduced=True, drop_path=0.2,
    epochs=300, batch_size=1024, optimiser="adamw", weight_decay=0.2, clip_norm=5.0,
    lr=1e-3, lr_min=1e-5,     # 5e-4 and 5e-6 per 512 images
    schedule="cosine", warmup_epochs=20,
    crop="resized", crop_interpolation="bicubic", rand_augment=True, random_erasing=0.25,
    mixup=0.8, cutmix=1.0, label_smoothing=0.1, test_fit="inner_crop",
    deferred_from=0.8, diversity_weight=-0.2, diversity_mean=True, diversity_gamma=0.02,
    router_epochs=0, router_top_k=50,
)  # fmt: skip
