"""ACE on CIFAR-100-LT."""

from training.recipe import Recipe

ACE_CIFAR100 = Recipe(
    # ACE, 3 experts, for all classes, the 65 and the 30 rarest, CIFAR-100-LT with imbalance 100.
    # Paper: arXiv:2108.02385, 49.4 % top-1, at 400 epochs; when the learning rate drops, and by how much, is not
    # known: at the same shares of the epochs as LDAM's, and as far, with its weight decay.
    # The routers after it are ours.
    # Run:   ride-train ace-cifar100         Ours: training/RESULTS.md
    name="ace-cifar100", method="ace", loss="ce", classifier="linear", n_experts=3, group_shares=(0.65, 0.3),
    epochs=400,
    complementary_weight=0.1,  # with 1, as it is read, the second expert diverges within an epoch at this learning rate
)  # fmt: skip
