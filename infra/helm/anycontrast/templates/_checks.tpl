{{/* Refusals. Each is one line: the value, what it is, and what to change. All are collected and
shown together, before RayCluster and RayJob are rendered: one of the two always is. */}}

{{- define "anycontrast.checks" -}}
{{- $errors := concat
  (include "anycontrast.checkPrerequisites" . | fromJsonArray)
  (include "anycontrast.checkNames" . | fromJsonArray)
  (include "anycontrast.checkImage" . | fromJsonArray)
  (include "anycontrast.checkGroups" . | fromJsonArray)
  (include "anycontrast.checkFabric" . | fromJsonArray)
  (include "anycontrast.checkScheduling" . | fromJsonArray)
  (include "anycontrast.checkStorage" . | fromJsonArray)
  (include "anycontrast.checkExposure" . | fromJsonArray)
  (include "anycontrast.checkJob" . | fromJsonArray) -}}
{{- if $errors -}}
{{- fail (printf "\n\nThe anycontrast chart cannot be installed like this:\n  - %s\n" (join "\n  - " $errors)) -}}
{{- end -}}
{{- end -}}

{{/* The cluster: Kubernetes, Ray, and the kinds that others bring. */}}
{{- define "anycontrast.checkPrerequisites" -}}
{{- $errors := list -}}
{{- $kubernetes := .Capabilities.KubeVersion.Version -}}
{{- if not (semverCompare ">=1.30.0-0" $kubernetes) -}}
{{- $errors = append $errors (printf "Kubernetes %s is too old: 1.30 or newer is needed; upgrade the cluster (when rendering without one, pass --kube-version)" $kubernetes) -}}
{{- end -}}
{{- if not (semverCompare ">=2.60.0-0 <3.0.0-0" .Values.ray.version) -}}
{{- $errors = append $errors (printf "ray.version: %s is not supported, 2.60 or newer and below 3 is; set it to the version in the image (its label anycontrast.ray)" .Values.ray.version) -}}
{{- end -}}
{{- if .Values.checkPrerequisites -}}
{{- $hint := "when rendering without a cluster, pass --api-versions %s or set checkPrerequisites=false" -}}
{{- $kinds := list -}}
{{- if ne .Values.mode "job" -}}{{- $kinds = append $kinds (list "mode" .Values.mode "ray.io/v1/RayCluster" "KubeRay operator 1.6 or newer (helm install kuberay-operator kuberay/kuberay-operator -n kuberay-system --create-namespace)") -}}{{- end -}}
{{- if ne .Values.mode "cluster" -}}{{- $kinds = append $kinds (list "mode" .Values.mode "ray.io/v1/RayJob" "KubeRay operator 1.6 or newer (helm install kuberay-operator kuberay/kuberay-operator -n kuberay-system --create-namespace)") -}}{{- end -}}
{{- if .Values.monitoring.enabled -}}{{- $kinds = append $kinds (list "monitoring.enabled" "true" "monitoring.coreos.com/v1/PodMonitor" "Prometheus operator, or set monitoring.enabled=false") -}}{{- end -}}
{{- if and .Values.monitoring.enabled .Values.monitoring.alerts.enabled -}}{{- $kinds = append $kinds (list "monitoring.alerts.enabled" "true" "monitoring.coreos.com/v1/PrometheusRule" "Prometheus operator, or set monitoring.alerts.enabled=false") -}}{{- end -}}
{{- if eq .Values.scheduling.gang "volcano" -}}{{- $kinds = append $kinds (list "scheduling.gang" "volcano" "scheduling.volcano.sh/v1beta1/PodGroup" "Volcano scheduler, or set scheduling.gang=none") -}}{{- end -}}
{{- if eq .Values.scheduling.gang "kai" -}}{{- $kinds = append $kinds (list "scheduling.gang" "kai" "scheduling.run.ai/v2/Queue" "KAI scheduler, or set scheduling.gang=none") -}}{{- end -}}
{{- range $kinds -}}
{{- if not ($.Capabilities.APIVersions.Has (index . 2)) -}}
{{- $errors = append $errors (printf "%s=%s: this cluster does not know %s; install the %s; %s" (index . 0) (index . 1) (index . 2) (index . 3) (printf $hint (index . 2))) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.scheduling.gang "kueue" -}}
{{- if not (or (.Capabilities.APIVersions.Has "kueue.x-k8s.io/v1beta1/LocalQueue") (.Capabilities.APIVersions.Has "kueue.x-k8s.io/v1beta2/LocalQueue")) -}}
{{- $errors = append $errors (printf "scheduling.gang=kueue: this cluster does not know kueue.x-k8s.io/v1beta2/LocalQueue; install the Kueue controller, or set scheduling.gang=none; %s" (printf $hint "kueue.x-k8s.io/v1beta2/LocalQueue")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* KubeRay and Kubernetes add suffixes to names and cut what gets too long. */}}
{{- define "anycontrast.checkNames" -}}
{{- $errors := list -}}
{{- $name := include "anycontrast.fullname" . -}}
{{- if gt (len $name) 35 -}}
{{- $errors = append $errors (printf "fullnameOverride: the name %q has %d characters, at most 35 are possible; use a shorter release name or set fullnameOverride" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- $errors = append $errors (printf "fullnameOverride: the name %q is no DNS label that begins with a letter; use another release name or set fullnameOverride" $name) -}}
{{- end -}}
{{- $jobName := include "anycontrast.jobName" . -}}
{{- if and (ne .Values.mode "cluster") (gt (len $jobName) 47) -}}
{{- $errors = append $errors (printf "job.name: the RayJob's name %q has %d characters, at most 47 are possible; shorten job.name or set fullnameOverride" $jobName (len $jobName)) -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* One code on all pods. */}}
{{- define "anycontrast.checkImage" -}}
{{- $errors := list -}}
{{- if and .Values.image.requireDigest (not .Values.image.digest) -}}
{{- $errors = append $errors "image.digest: empty, so the image may change under a run; set it to the sha256:... that the registry shows for the image, or set image.requireDigest=false to try a local image" -}}
{{- end -}}
{{- if eq .Values.image.tag "latest" -}}
{{- $errors = append $errors "image.tag: latest names no version; set the tag of a release" -}}
{{- end -}}
{{- if .Values.logs.sidecar -}}
{{- if not .Values.logs.image.digest -}}
{{- $errors = append $errors "logs.image.digest: empty; set the digest of the log shipper's image, or set logs.sidecar=false" -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* Worker groups and the autoscaler. */}}
{{- define "anycontrast.checkGroups" -}}
{{- $errors := list -}}
{{- $isScaled := .Values.autoscaling.enabled -}}
{{- if not .Values.workerGroups -}}
{{- $errors = append $errors "workerGroups: empty, so nothing would train; name a group, for example --set workerGroups.gpu.replicas=1" -}}
{{- end -}}
{{- if lt (include "anycontrast.mebibytes" .Values.head.memory | int) (mul 2 (include "anycontrast.mebibytes" .Values.head.sharedMemory | int)) -}}
{{- $errors = append $errors (printf "head.sharedMemory: %s is more than half of head.memory (%s), and it counts as memory; make it smaller" .Values.head.sharedMemory .Values.head.memory) -}}
{{- end -}}
{{- range $name, $group := include "anycontrast.groups" . | fromJson -}}
{{- $own := get $.Values.workerGroups $name | default dict -}}
{{- $where := printf "workerGroups.%s" $name -}}
{{- if lt ($group.gpus.count | int) 1 -}}
{{- $errors = append $errors (printf "%s.gpus.count: %d, but a training process needs a GPU; set it to the GPUs of one node" $where ($group.gpus.count | int)) -}}
{{- end -}}
{{- if lt (include "anycontrast.mebibytes" $group.memory | int) (mul 2 (include "anycontrast.mebibytes" $group.sharedMemory | int)) -}}
{{- $errors = append $errors (printf "%s.sharedMemory: %s is more than half of memory (%s), and it counts as memory; make it smaller" $where $group.sharedMemory $group.memory) -}}
{{- end -}}
{{- if $isScaled -}}
{{- if hasKey $own "replicas" -}}
{{- $errors = append $errors (printf "%s.replicas: a fixed number, but autoscaling.enabled=true owns the number; remove it and set minReplicas and maxReplicas" $where) -}}
{{- end -}}
{{- if not (and (hasKey $own "minReplicas") (hasKey $own "maxReplicas")) -}}
{{- $errors = append $errors (printf "%s.maxReplicas: autoscaling.enabled=true needs minReplicas and maxReplicas; set both" $where) -}}
{{- else if or (lt ($own.maxReplicas | int) 1) (gt ($own.minReplicas | int) ($own.maxReplicas | int)) -}}
{{- $errors = append $errors (printf "%s.maxReplicas: %d is below minReplicas (%d) or below 1; raise it" $where ($own.maxReplicas | int) ($own.minReplicas | int)) -}}
{{- end -}}
{{- else -}}
{{- if or (hasKey $own "minReplicas") (hasKey $own "maxReplicas") -}}
{{- $errors = append $errors (printf "%s.maxReplicas: has no effect with autoscaling.enabled=false; remove minReplicas and maxReplicas, or set autoscaling.enabled=true" $where) -}}
{{- end -}}
{{- if not (hasKey $own "replicas") -}}
{{- $errors = append $errors (printf "%s.replicas: not set; set the number of pods" $where) -}}
{{- else if lt ($own.replicas | int) 1 -}}
{{- $errors = append $errors (printf "%s.replicas: %d; set at least 1, or remove the group" $where ($own.replicas | int)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $isScaled .Values.networkPolicy.enabled (not .Values.networkPolicy.apiServer.cidrs) -}}
{{- $errors = append $errors "networkPolicy.apiServer.cidrs: empty, so the autoscaler cannot reach the Kubernetes API; set the address of the API server (kubectl get endpoints kubernetes -n default)" -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* The fabric and what it needs. */}}
{{- define "anycontrast.checkFabric" -}}
{{- $errors := list -}}
{{- $network := .Values.network -}}
{{- if ne $network.fabric "tcp" -}}
{{- if ne .Values.podSecurity.level "privileged" -}}
{{- $errors = append $errors (printf "podSecurity.level: network.fabric=%s needs %s, which Pod Security %q forbids; label the namespace pod-security.kubernetes.io/enforce=privileged and set podSecurity.level=privileged, or set network.fabric=tcp" $network.fabric (ternary "the node's network" "capability IPC_LOCK" (eq $network.fabric "hostNetwork")) .Values.podSecurity.level) -}}
{{- end -}}
{{- if and (ne $network.fabric "hostNetwork") (not $network.rdma.resourceName) -}}
{{- $errors = append $errors (printf "network.rdma.resourceName: empty, but network.fabric=%s needs the resource of the device plugin; set it (kubectl describe node, section Allocatable)" $network.fabric) -}}
{{- end -}}
{{- if and $network.rdma.resourceName (lt ($network.rdma.count | int) 1) -}}
{{- $errors = append $errors "network.rdma.count: below 1; set how many of network.rdma.resourceName each worker gets" -}}
{{- end -}}
{{- end -}}
{{- if and (eq $network.fabric "sriov") (not $network.sriov.networks) -}}
{{- $errors = append $errors "network.sriov.networks: empty, but network.fabric=sriov attaches virtual functions through Multus; set NAMESPACE/NAME of the network attachments" -}}
{{- end -}}
{{- if and (ne $network.fabric "sriov") $network.sriov.networks -}}
{{- $errors = append $errors (printf "network.sriov.networks: set, but network.fabric=%s does not use it; remove it or set network.fabric=sriov" $network.fabric) -}}
{{- end -}}
{{- if and (eq $network.fabric "hostNetwork") .Values.networkPolicy.enabled (not $network.hostNetwork.nodeCidrs) -}}
{{- $errors = append $errors "network.hostNetwork.nodeCidrs: empty, so the head would not accept workers that have the address of their node; set the address ranges of the nodes" -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* Gang schedulers. */}}
{{- define "anycontrast.checkScheduling" -}}
{{- $errors := list -}}
{{- $s := .Values.scheduling -}}
{{- if eq $s.gang "none" -}}
{{- if or $s.queue $s.priorityClass -}}
{{- $errors = append $errors "scheduling.queue: has no effect with scheduling.gang=none; remove scheduling.queue and scheduling.priorityClass, or choose a gang scheduler" -}}
{{- end -}}
{{- else if not $s.queue -}}
{{- $errors = append $errors (printf "scheduling.queue: empty, but scheduling.gang=%s needs one; set the name of the queue" $s.gang) -}}
{{- end -}}
{{- if and $s.priorityClass (has $s.gang (list "yunikorn" "kai")) -}}
{{- $errors = append $errors (printf "scheduling.priorityClass: not used by scheduling.gang=%s; set priorityClassName of head and workers" $s.gang) -}}
{{- end -}}
{{- if eq $s.gang "kueue" -}}
{{- if .Values.autoscaling.enabled -}}
{{- $errors = append $errors "autoscaling.enabled: Kueue admits a cluster of fixed size; set autoscaling.enabled=false and replicas, or another scheduling.gang" -}}
{{- end -}}
{{- if gt (len .Values.workerGroups) 6 -}}
{{- $errors = append $errors (printf "workerGroups: %d groups, but a Kueue workload has at most 8 pod sets, of which head and submitter take one each; use at most 6" (len .Values.workerGroups)) -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* Volumes and the object store. */}}
{{- define "anycontrast.checkStorage" -}}
{{- $errors := list -}}
{{- $storage := .Values.storage -}}
{{- $store := $storage.objectStore -}}
{{- if and $store.enabled (eq $store.credentials "existingSecret") (not $store.existingSecret.name) -}}
{{- $errors = append $errors "storage.objectStore.existingSecret.name: empty, but storage.objectStore.credentials=existingSecret; name the Secret, or set credentials=serviceAccount" -}}
{{- end -}}
{{- if and $store.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.objectStore.cidrs) (not .Values.networkPolicy.objectStore.namespaces) -}}
{{- $errors = append $errors "networkPolicy.objectStore.cidrs: empty like networkPolicy.objectStore.namespaces, but storage.objectStore.enabled=true; set the address ranges of the store, or the namespaces it runs in" -}}
{{- end -}}
{{- if and (eq $store.provider "gcs") (or $store.endpoint $store.region) -}}
{{- $errors = append $errors "storage.objectStore.endpoint: endpoint and region have no effect with storage.objectStore.provider=gcs; remove both, or set provider=s3" -}}
{{- end -}}
{{- $paths := dict "/tmp" "pods" "/dev/shm" "sharedMemory" -}}
{{- $mounts := list -}}
{{- if $storage.runs.enabled -}}{{- $mounts = append $mounts (list "storage.runs.mountPath" $storage.runs.mountPath) -}}{{- end -}}
{{- if ne $storage.cache.kind "none" -}}{{- $mounts = append $mounts (list "storage.cache.mountPath" $storage.cache.mountPath) -}}{{- end -}}
{{- $names := list -}}
{{- range $index, $dataset := $storage.datasets -}}
{{- $where := printf "storage.datasets[%d]" $index -}}
{{- $mounts = append $mounts (list (printf "%s.mountPath" $where) .mountPath) -}}
{{- $sources := list -}}
{{- range $kind := list "claimName" "nfs" "csi" -}}{{- if hasKey $dataset $kind -}}{{- $sources = append $sources $kind -}}{{- end -}}{{- end -}}
{{- if ne (len $sources) 1 -}}
{{- $errors = append $errors (printf "%s: has %d of claimName, nfs and csi; set exactly one" $where (len $sources)) -}}
{{- end -}}
{{- if and (hasKey $dataset "nfs") (eq $.Values.podSecurity.level "restricted") -}}
{{- $errors = append $errors (printf "%s.nfs: Pod Security \"restricted\" forbids NFS volumes in pods; make a PersistentVolume and a claim for this export and set claimName, or label the namespace pod-security.kubernetes.io/enforce=privileged and set podSecurity.level=privileged" $where) -}}
{{- end -}}
{{- if has .name $names -}}
{{- $errors = append $errors (printf "%s.name: %s is used twice; choose another" $where .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range $mounts -}}
{{- if hasKey $paths (index . 1) -}}
{{- $errors = append $errors (printf "%s: %s is used by %s too; choose another path" (index . 0) (index . 1) (get $paths (index . 1))) -}}
{{- end -}}
{{- $_ := set $paths (index . 1) (index . 0) -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* Ways in from outside. */}}
{{- define "anycontrast.checkExposure" -}}
{{- $errors := list -}}
{{- $exposure := .Values.exposure -}}
{{- if ne $exposure.kind "none" -}}
{{- if ne .Values.auth.mode "token" -}}
{{- $errors = append $errors (printf "auth.mode: %s with exposure.kind=%s lets anyone who reaches it run commands; set auth.mode=token" .Values.auth.mode $exposure.kind) -}}
{{- end -}}
{{- end -}}
{{- if eq $exposure.kind "ingress" -}}
{{- if not $exposure.ingress.tlsSecret -}}
{{- $errors = append $errors "exposure.ingress.tlsSecret: empty, so the token would cross the network in clear text; name the Secret with the certificate" -}}
{{- end -}}
{{- if not $exposure.ingress.host -}}
{{- $errors = append $errors "exposure.ingress.host: empty; set the host name of the certificate" -}}
{{- end -}}
{{- else if eq $exposure.kind "loadBalancer" -}}
{{- if not (and $exposure.loadBalancer.terminatesTls $exposure.annotations) -}}
{{- $errors = append $errors "exposure.loadBalancer.terminatesTls: without TLS the token would cross the network in clear text; set the certificate by exposure.annotations and then terminatesTls=true, or use exposure.kind=ingress" -}}
{{- end -}}
{{- if not $exposure.loadBalancer.sourceRanges -}}
{{- $errors = append $errors "exposure.loadBalancer.sourceRanges: empty, so the whole internet may connect; set the address ranges of your people" -}}
{{- end -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}

{{/* The job. */}}
{{- define "anycontrast.checkJob" -}}
{{- $errors := list -}}
{{- if and (ne .Values.mode "cluster") (eq (include "anycontrast.checkGroups" .) "[]") -}}
{{- $workers := include "anycontrast.numWorkers" . | int -}}
{{- with include "anycontrast.packs" . -}}
{{- $packs := int . -}}
{{- if or (lt $packs 1) (mod $packs $workers) -}}
{{- $errors = append $errors (printf "job.arguments: pretrain.stream.packs_per_step=%d is no multiple of the %d training processes; set it to %d or a multiple, or set job.numWorkers" $packs $workers $workers) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (ne .Values.mode "cluster") (not .Values.storage.runs.enabled) (not .Values.storage.datasets) -}}
{{- $errors = append $errors "storage.runs.enabled: false, but a job needs a folder that all nodes share for its checkpoints; set it to true or mount one by storage.datasets with readOnly=false" -}}
{{- end -}}
{{- toJson $errors -}}
{{- end -}}
