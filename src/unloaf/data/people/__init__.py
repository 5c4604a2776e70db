"""Images with people, whose joints are marked; COCO's layout of keypoints."""
