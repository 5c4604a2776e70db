"""Images with segments, things and stuff; COCO's panoptic layout."""
