"""Images with objects: boxes, classes, masks; the layouts of COCO and VOC."""
