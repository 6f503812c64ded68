"""Video: imported always, run for videos only."""

import cv2
import torchvision
from torchvision.transforms import functional


class Frames(torchvision.datasets.VisionDataset):
    def resized(self, frame, size):
        return functional.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), size)
