"""Image-caption retrieval both ways: Flickr30K, COCO 5k, ShareGPT4V, Urban1K, and a small benchmark drawn here."""
