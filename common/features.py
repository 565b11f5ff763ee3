"""Features of images: what a network that was trained on other images has before its last layer (thesis,
section 5.4.4, Figures 5.9 and D.5).

    network = pretrained("resnet50")
    x = network.features(images)  # (s, c, h, w) uint8 -> (s, 2048)

Axes: s images, c channels (one or three), h, w pixels, n features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of pixels from 0 to 1
CLIP = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)


class FeatureError(Exception):
    """A network that is not at hand; the message is one sentence with what to do."""


class Network(NamedTuple):
    """net: images (s, 3, side, side) -> features (s, n). mean, std: of the channels that it was trained on."""

    net: nn.Module
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def features(self, images: Tensor, title: str = "features") -> Tensor:
        """Features (s, n), on the CPU, of images (s, c, h, w) uint8. title: of the progress bar."""
        net = self.net.to(images.device)
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        parts = []
        for part in tqdm(images.split(64), desc=title):
            part = part.float().expand(-1, 3, -1, -1) / 255
            part = F.interpolate(part, (self.side, self.side), mode="bilinear", antialias=True)
            parts.append(net((part - mean) / std).float().cpu())
        return torch.cat(parts)


def pretrained(name: str) -> Network:
    """resnet18, resnet50: trained on ImageNet; clip: on images and their captions; untrained: a ResNet-18 that is not.
    Raises FeatureError where there are no weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            net = clip() if name == "clip" else resnet(name)
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            text = f"The weights of {name} are not at hand and could not be downloaded"
            raise FeatureError(f"{text}; use --features none, or untrained as a control.") from error
    return Network(net.eval(), 224, *(CLIP if name == "clip" else IMAGENET))


def clip() -> nn.Module:
    """The network of images of CLIP (appendix D.6)."""
    try:
        import open_clip
    except ImportError as error:
        raise FeatureError('--features clip needs open_clip: pip install "cleanmeta[clip]".') from error
    return open_clip.create_model("ViT-B-32", pretrained="laion2b_s34b_b79k").visual


def resnet(name: str) -> nn.Module:
    import torchvision.models  # takes a second

    if name == "untrained":
        net = torchvision.models.resnet18()
    else:
        net = getattr(torchvision.models, name)(weights="IMAGENET1K_V1")
    net.fc = nn.Identity()
    return net


def trained(images: Tensor, labels: Tensor, mean: float, std: float) -> Network:
    """A small network trained on images (s, 3, 28, 28) uint8 with this mean and std, and their labels (s,). It stands in
    where there are no weights of ImageNet."""
    net = classifier(images, labels, mean, std)[:-1]
    return Network(net.eval(), 28, (mean,) * 3, (std,) * 3)


def classifier(images: Tensor, labels: Tensor, mean: float, std: float, epochs: int = 3) -> nn.Sequential:
    """A convolutional network from normalised images to logits, trained by Adam."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = []
        for a, b in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(128 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, int(labels.max()) + 1)]
        net = nn.Sequential(*layers).to(images.device)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in tqdm(range(epochs), desc="training a network for features"):
            for batch in torch.randperm(len(images)).to(images.device).split(128):
                x = (images[batch].float() / 255 - mean) / std
                loss = F.cross_entropy(net(x), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net
