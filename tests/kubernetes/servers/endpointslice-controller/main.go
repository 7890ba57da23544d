// The EndpointSlice controller of Kubernetes, unchanged and alone: kube-controller-manager has some
// forty controllers, of which the tests need this one.
package main

import (
	"context"
	"flag"
	"os/signal"
	"syscall"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/endpointslice"
)

// As in kube-controller-manager's defaults.
const (
	maxEndpointsPerSlice = 100
	concurrentSyncs      = 5
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "file with the API server's address and credentials")
	flag.Parse()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		klog.Fatal(err)
	}
	config.QPS, config.Burst = 20, 30
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	client := kubernetes.NewForConfigOrDie(config)
	factory := informers.NewSharedInformerFactory(client, 0)
	core, discovery := factory.Core().V1(), factory.Discovery().V1()
	controller := endpointslice.NewController(
		ctx, core.Pods(), core.Services(), core.Nodes(), discovery.EndpointSlices(),
		maxEndpointsPerSlice, client, 0,
	)
	factory.Start(ctx.Done())
	controller.Run(ctx, concurrentSyncs)
}
