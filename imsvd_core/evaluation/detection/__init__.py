"""Detection and instance segmentation: Mask R-CNN on COCO."""
